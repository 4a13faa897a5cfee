"""The OpenAI HTTP API, above whatever implements `resplit.gateway.engine`."""
