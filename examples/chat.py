"""A conversation of two turns, and how the swarm answered."""

from metaswarm_client import Message, Swarm

with Swarm() as swarm:
    turns: list[Message] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    answer = swarm.chat(turns, max_tokens=40, temperature=0)
    print(answer.text)

    turns += [answer.message, {"role": "user", "content": "And of Italy?"}]
    answer = swarm.chat(turns, max_tokens=40, temperature=0)
    print(answer.text)

    print(f"\n{answer.usage.completion_tokens} tokens in {answer.job.timing.total_s:.2f} s, by these peers:")
    for stage in answer.job.route:
        print(f"  {stage.peer}  blocks {stage.start}-{stage.end}, computed {stage.compute_s:.3f} s")
