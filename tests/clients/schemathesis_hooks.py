"""What schemathesis does not know itself."""

import json

import schemathesis


@schemathesis.deserializer("application/x-ndjson")
def lines(context, response):
    return [json.loads(line) for line in response.content.splitlines()]
