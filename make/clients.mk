# make test-clients: agent frameworks and command lines, unmodified, against the real server, and MCP servers behind it.
# They live in environments of their own, .venv-clients, -litellm and -mcp, and in tests_clients/npm; the server in .venv.
CLIENTS := .venv-clients
LITELLM := .venv-clients-litellm
MCP := .venv-clients-mcp
RLLM := .venv-clients-rllm
NPM := tests_clients/npm
CLIENT_TESTS := -q -p no:cacheprovider --timeout 180

.PHONY: setup-clients setup-gateway test-clients

$(CLIENTS)/.ready $(LITELLM)/.ready $(MCP)/.ready $(RLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --progress-bar on --group $(patsubst .venv-%,%,$(@D))
	touch $@

$(NPM)/node_modules/.ready: $(NPM)/package.json
	cd $(NPM) && npm install --no-audit --no-fund --silent
	touch $@

setup-clients: setup $(CLIENTS)/.ready $(LITELLM)/.ready $(MCP)/.ready $(NPM)/node_modules/.ready

setup-gateway: setup $(LITELLM)/.ready $(RLLM)/.ready    # for python -m benchmarks.gateway

test-clients: setup-clients
	$(CLIENTS)/bin/python -m pytest $(CLIENT_TESTS) tests_clients --ignore tests_clients/test_litellm.py $(ARGS)
	$(LITELLM)/bin/python -m pytest $(CLIENT_TESTS) tests_clients/test_litellm.py $(ARGS)
	$(VENV)/bin/python -m pytest $(CLIENT_TESTS) tests_clients/test_mcp_servers.py $(ARGS)
