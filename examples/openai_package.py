"""The unmodified `openai` package against a node; `extra_body` chooses method and quality."""

import os

from openai import OpenAI

url = os.environ.get("METASWARM_API", "http://127.0.0.1:8642")
with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("METASWARM_API_KEY", "none")) as client:
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello to the swarm."}],
        max_tokens=24,
        temperature=0,
        stream=True,
        extra_body={"metaswarm": {"method": "auto", "quality": "exact"}},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        job = (chunk.model_extra or {}).get("metaswarm")  # the last chunk has it
        if job:
            print(f"\n\n{model}, {len(job['route'])} peers, method {job['method']['name']}")
