"""The OpenAI HTTP API, above any implementation of `resplit.gateway.engine`."""
