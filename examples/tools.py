"""A tool that the model calls, for models whose chat template knows tools."""

from metaswarm_client import Message, Swarm, Tool

CAPITALS = {"France": "Paris", "Italy": "Rome"}
LOOK_UP = Tool(
    name="capital_of",
    description="Return the capital of a country.",
    parameters={
        "type": "object",
        "properties": {"country": {"enum": list(CAPITALS)}},
        "required": ["country"],
        "additionalProperties": False,
    },
)

with Swarm() as swarm:
    turns: list[Message] = [{"role": "user", "content": "What is the capital of Italy?"}]
    # "required" makes every model call one; with "auto", the default, it decides.
    answer = swarm.chat(turns, tools=[LOOK_UP], tool_choice="required", temperature=0, max_tokens=60)
    turns.append(answer.message)
    for call in answer.tool_calls:
        result = CAPITALS[call.parsed()["country"]]
        print(f"{call.name}({call.arguments}) -> {result}")
        turns.append(call.result(result))
    print(swarm.chat(turns, tools=[LOOK_UP], tool_choice="none", temperature=0, max_tokens=40).text)
