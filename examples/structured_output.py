"""An answer that follows a JSON Schema: the last peer of the route draws only tokens that keep to it."""

from metaswarm_client import Swarm

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
}

with Swarm() as swarm:
    answer = swarm.chat("Invent a person who lives by the sea.", schema=PERSON, max_tokens=200, seed=1)
    person = answer.parsed()
    print(f"{person['name']} is {person['age']} years old and likes {', '.join(person['hobbies']) or 'nothing'}.")
