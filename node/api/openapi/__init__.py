"""The OpenAPI description of the HTTP API, made from the forms that requests are read by and the types of answers."""
