"""Text as it comes; leaving the block early cancels the job on every peer."""

from metaswarm_client import Swarm

with Swarm() as swarm:
    with swarm.stream_chat("Tell me a story about a lighthouse.", max_tokens=60, seed=7) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
    timing = stream.answer.job.timing
    print(f"\n\nfirst token after {timing.ttft_s:.2f} s, then {1 / timing.tpot_s:.0f} tokens/s")

    print("\nThe first 100 characters:")
    text = ""
    with swarm.stream_chat("Count to a thousand.", temperature=0) as stream:
        for delta in stream:
            text += delta.text
            if len(text) >= 100:
                break
    print(text)
