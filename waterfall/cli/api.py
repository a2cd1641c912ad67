"""The gateway as the command line sees it, and where to find it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from waterfall.errors import SettingsError, WaterfallError

DEV_FILE = Path(".waterfall/dev.json")


class GatewayAnswered(WaterfallError):
    """{reason}"""

    code = "gateway_error"


@dataclass(frozen=True)
class Api:
    """Calls a gateway's own interface with the platform's key."""

    url: str
    key: str

    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, **headers: str
    ) -> Any:
        """The answer's JSON.

        Raises:
            GatewayAnswered: the gateway's own error message, or that it cannot be reached.
        """
        sent = {"Authorization": f"Bearer {self.key}", **headers}
        try:
            async with (
                aiohttp.ClientSession(headers=sent) as session,
                session.request(method, self.url + path, json=body) as response,
            ):
                answer = await response.json()
        except aiohttp.ClientConnectorError:
            raise GatewayAnswered(
                reason=f"No gateway answers at {self.url}: start one with `waterfall dev`."
            ) from None
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
            raise GatewayAnswered(reason=f"{self.url} does not answer like a gateway: {error}") from None
        if response.status >= 400:  # noqa: PLR2004 - HTTP's error statuses
            raise GatewayAnswered(reason=answer["error"]["message"])
        return answer


def read_dev_file() -> dict[str, Any]:
    """What the last `waterfall dev` in this folder wrote of itself.

    Raises:
        SettingsError: there is none, or it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(DEV_FILE.read_text())
    except FileNotFoundError:
        raise SettingsError(
            reason="Which gateway? Start `waterfall dev` in this folder, or give --url and --key "
            "(WATERFALL_URL, WATERFALL_ADMIN_KEY)."
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(reason=f"{DEV_FILE}: {error}") from None
    return found


def connect(url: str | None, key: str | None) -> Api:
    """The gateway named by options, by the environment, or by a running `waterfall dev`.

    Raises:
        SettingsError
    """
    url = url or os.environ.get("WATERFALL_URL")
    key = key or os.environ.get("WATERFALL_ADMIN_KEY")
    if url is None or key is None:
        dev = read_dev_file()
        url, key = url or dev["gateway_url"], key or dev["admin_key"]
    return Api(url.rstrip("/"), key)
