"""The gateway: the OpenAI HTTP API in front of an engine that generates tokens over the nodes."""
