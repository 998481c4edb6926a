"""What is chosen: an acceleration method, a point in a space of independent switches (DESIGN §6)."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """A named, valid combination of switches.

    `session` switches are chosen per job and hold on all its stages. `stage` switches are the policy in force on the
    stages that serve it, which changes slowly: a policy per job would tear batches apart.
    """

    session: Mapping[str, str]
    stage: Mapping[str, str]

    @property
    def name(self) -> str:
        """The canonical name of what a job may choose: its sorted switches."""
        return "|".join(f"{switch}={value}" for switch, value in sorted(self.session.items()))


BASELINE = Method(
    session={
        "activations": "fp32",
        "arithmetic": "fp32",
        "prefill_chunk": "none",
        "prefix_cache": "off",
        "speculation": "off",
    },
    stage={"batching": "one", "engine": "torch"},
)
"""The plain way, exact by definition, and what every other method is compared with."""

METHODS: Mapping[str, Method] = {"baseline": BASELINE, BASELINE.name: BASELINE}
"""The methods on offer, by every name that a user may give them."""
