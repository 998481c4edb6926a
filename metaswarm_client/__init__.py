"""Python client of metaswarm: `Swarm` blocks, `AsyncSwarm` runs under asyncio and trio.

`metaswarm_client.answers` and `metaswarm_client.swarm_documents` have the types of everything that they return.
"""

from metaswarm_client.answers import Answer, Delta, Job, Score, ToolCall
from metaswarm_client.async_client import AsyncAnswerStream, AsyncSwarm
from metaswarm_client.client import AnswerStream, Swarm
from metaswarm_client.errors import (
    AccessDeniedError,
    ApiError,
    InvalidRequestError,
    JobFailedError,
    NodeUnreachableError,
    NotFoundError,
    RateLimitError,
    SwarmError,
    UnavailableError,
    UnexpectedAnswerError,
)
from metaswarm_client.options import ChatOptions, JobOptions, Message, Tool
from metaswarm_client.swarm_documents import Explanation, Model, NodeStatus, Peer

__all__ = [
    "AccessDeniedError",
    "Answer",
    "AnswerStream",
    "ApiError",
    "AsyncAnswerStream",
    "AsyncSwarm",
    "ChatOptions",
    "Delta",
    "Explanation",
    "InvalidRequestError",
    "Job",
    "JobFailedError",
    "JobOptions",
    "Message",
    "Model",
    "NodeStatus",
    "NodeUnreachableError",
    "NotFoundError",
    "Peer",
    "RateLimitError",
    "Score",
    "Swarm",
    "SwarmError",
    "Tool",
    "ToolCall",
    "UnavailableError",
    "UnexpectedAnswerError",
]
