"""JSON-RPC to one chain. Failures are told apart: the node said no (`RpcError`), or nobody knows (`RpcUnavailable`)."""

from typing import Any

import aiohttp
from web3 import AsyncHTTPProvider
from web3.types import RPCEndpoint

from waterfall.errors import ChainError


class RpcUnavailable(ChainError):
    """The chain's node at {endpoint} gave no answer: {reason}."""

    code = "rpc_unavailable"


class RpcError(ChainError):
    """The chain's node refused {method}: {reason}."""

    code = "rpc_error"


class Rpc:
    """Calls one node."""

    def __init__(self, url: str, *, timeout_seconds: float = 10) -> None:
        self.url = url
        self.provider = AsyncHTTPProvider(
            url,
            request_kwargs={"timeout": aiohttp.ClientTimeout(total=timeout_seconds)},
            exception_retry_configuration=None,
        )

    async def call(self, method: str, *parameters: Any) -> Any:
        """The result of one call.

        Raises:
            RpcUnavailable: no answer, or not a JSON-RPC answer; whatever was asked may have happened.
            RpcError: the node's own error; `details["data"]` carries revert data where it sent any.
        """
        try:
            response: Any = await self.provider.make_request(RPCEndpoint(method), list(parameters))
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise RpcUnavailable(endpoint=self.url, reason=reason, method=method) from error
        error_ = response.get("error") if isinstance(response, dict) else None
        if error_ is not None:
            facts = error_ if isinstance(error_, dict) else {}
            reason = str(facts.get("message", error_))
            raise RpcError(method=method, reason=reason, data=facts.get("data"))
        if not isinstance(response, dict) or "result" not in response:
            raise RpcUnavailable(endpoint=self.url, reason="its answer is not JSON-RPC", method=method)
        return response["result"]

    async def close(self) -> None:
        """Close the connections."""
        await self.provider.disconnect()
