"""The gateway as the command line sees it, and where to find it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from pydantic import TypeAdapter, ValidationError

from waterfall.cli.folder import DEV_FOLDER, Folder
from waterfall.cli.output import first_problem
from waterfall.errors import SettingsError, WaterfallError
from waterfall.gateway.wire import ErrorBody


class GatewayAnswered(WaterfallError):
    """{reason}"""

    code = "gateway_error"


@dataclass(frozen=True)
class Api:
    """Calls a gateway's own interface with the platform's key."""

    url: str
    key: str

    async def request(self, shape: Any, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer as JSON of a shape, which is one of the gateway's views.

        Raises:
            GatewayAnswered: the gateway's own error message, or that no gateway answers there.
        """
        try:
            async with (
                aiohttp.ClientSession(headers={"Authorization": f"Bearer {self.key}"}) as session,
                session.request(method, self.url + path, json=body) as response,
            ):
                answer = await response.json()
            if not response.ok:
                raise GatewayAnswered(reason=ErrorBody.model_validate(answer).error.message)
            view: TypeAdapter[Any] = TypeAdapter(shape)
            return view.dump_python(view.validate_python(answer), mode="json")
        except aiohttp.ClientConnectorError:
            raise GatewayAnswered(
                reason=f"No gateway answers at {self.url}: start one with `waterfall dev`."
            ) from None
        except ValidationError as error:
            raise self._no_gateway(f"HTTP {response.status}, {first_problem(error)}") from None
        except (aiohttp.ClientError, TimeoutError, ValueError, RecursionError) as error:
            raise self._no_gateway(str(error) or type(error).__name__) from None

    def _no_gateway(self, problem: str) -> GatewayAnswered:
        return GatewayAnswered(reason=f"{self.url} does not answer like a gateway: {problem}")


def connect(url: str | None, key: str | None) -> Api:
    """The gateway named by options, by the environment, or by a running `waterfall dev`.

    Raises:
        SettingsError
    """
    url = url or os.environ.get("WATERFALL_URL")
    key = key or os.environ.get("WATERFALL_ADMIN_KEY")
    if url is None or key is None:
        dev = Folder(DEV_FOLDER).read()
        url, key = url or dev.gateway_url, key or dev.admin_key
    if not (key.isascii() and key.isprintable()):  # no header can carry it
        raise SettingsError(reason="The key (--key, WATERFALL_ADMIN_KEY) has characters that no key has.")
    return Api(url.rstrip("/"), key)
