"""Acceleration methods: what the swarm would choose and why, what it chose, and the choice made by hand."""

from metaswarm_client import Swarm

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8

with Swarm() as swarm:
    explanation = swarm.explain(prompt_tokens=80, max_tokens=32, quality="exact")
    print(f"By {explanation.selection.basis}, the peers would agree on {explanation.agreed}")
    for method in explanation.methods[:3]:
        low, high = method.speedup_low, method.speedup_high
        print(f"  {method.predicted_speedup:.2f}x ({low:.2f} to {high:.2f})  {method.name}")

    texts = set()
    for choice in ("auto", "baseline", "speculation=ngram-8"):
        answer = swarm.complete(PROMPT, method=choice, quality="exact", max_tokens=32, temperature=0)
        texts.add(answer.text)
        print(f"\n{choice}: {answer.job.method.name}, {answer.job.timing.total_s:.2f} s")
        print(f"  {len(answer.job.consensus.votes)} peers voted, for {answer.job.consensus.agreed}")
    print("\nexact methods give one text:", len(texts) == 1)
