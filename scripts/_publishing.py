"""Publishing the vault's sources at Etherscan and Sourcify, by ape's plugins where they are installed.

Their own `publish_contract` would not do: it compiles anew what ape finds, and looks for the constructor's arguments in
a transaction that, here, went to the deployment proxy. So the plugins' clients get exactly what was verified.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ape
from ape.exceptions import ApeException

from scripts._compiler import NAME, SOURCE
from scripts._refusals import PublisherMissing, PublishingFailed
from waterfall.chain.deployment import DeploymentRecord

IDENTIFIER = f"{SOURCE}:{NAME}"
_MIT = 3  # https://etherscan.io/contract-license-types
_TRIES, _POLL_SECONDS = 60, 3.0


@dataclass(frozen=True)
class Publication:
    """What is published."""

    record: DeploymentRecord
    standard_input: dict[str, Any]
    constructor_arguments: str
    """ABI-encoded, hex without 0x."""


def sourcify(publication: Publication, _network: Any) -> str:
    """Publish at Sourcify; where it is then."""
    from ape_sourcify import SourcifyConfig  # noqa: PLC0415 - optional
    from ape_sourcify.client import SourcifyClient  # noqa: PLC0415
    from ape_sourcify.verify import SourceVerifier  # noqa: PLC0415

    record = publication.record

    class Verifier(SourceVerifier):
        compiler_version = record.compiler.version
        contract_identifier = IDENTIFIER
        creation_transaction_hash = record.transaction

        def build_standard_json_input(self) -> dict[str, Any]:
            return publication.standard_input

    config = SourcifyConfig.model_validate(ape.config.get_config("sourcify").model_dump())
    client = SourcifyClient(str(config.api_url), timeout=config.request_timeout, retries=config.retries)
    verifier = Verifier(
        record.address,
        record.chain_id,
        client,
        str(config.repository_url).rstrip("/"),
        verification_timeout=config.verification_timeout,
        poll_interval=config.poll_interval,
    )
    verifier.attempt_verification()
    return str(verifier.contract_url)


def etherscan(publication: Publication, network: Any) -> str:
    """Publish at the chain's explorer of Etherscan's; where it is then. ETHERSCAN_API_KEY has a key of theirs."""
    from ape_etherscan.client import ClientFactory  # noqa: PLC0415 - optional
    from ape_etherscan.explorer import Etherscan  # noqa: PLC0415
    from ape_etherscan.types import EtherscanInstance  # noqa: PLC0415

    record, settings = publication.record, publication.record.compiler.settings
    explorer = Etherscan(name="etherscan", network=network)
    instance = EtherscanInstance(
        ecosystem_name=network.ecosystem.name,
        network_name=network.name,
        uri=explorer.etherscan_uri,
        api_uri=explorer.etherscan_api_uri,
    )
    client = ClientFactory(instance).get_contract_client(record.address)
    where = f"{explorer.get_address_url(record.address)}#code"
    try:
        ticket = client.verify_source_code(
            publication.standard_input,
            record.compiler.version,
            contract_name=IDENTIFIER,
            optimization_used=settings["optimizer"]["enabled"],
            optimization_runs=settings["optimizer"]["runs"],
            constructor_arguments=publication.constructor_arguments,
            evm_version=settings["evmVersion"],
            license_type=_MIT,
            via_ir=settings["viaIR"],
        )
        for _ in range(_TRIES):
            status = client.check_verify_status(ticket)
            if status.startswith(("Pass", "Already Verified")):
                return where
            if status.startswith("Fail"):
                raise PublishingFailed(service="Etherscan", reason=status)
            time.sleep(_POLL_SECONDS)
    except ApeException as error:
        if "already verified" in str(error):
            return where
        raise
    raise PublishingFailed(service="Etherscan", reason="it did not come to an end with it")


@dataclass(frozen=True)
class Service:
    """Where sources are published, by a plugin that is not a dependency of ours."""

    name: str
    plugin: str
    version: str
    """Seen to work with our ape."""
    publish: Callable[[Publication, Any], str]

    def require(self) -> None:
        """See that the plugin is there.

        Raises:
            PublisherMissing
        """
        if importlib.util.find_spec(self.plugin.replace("-", "_")) is None:
            raise PublisherMissing(service=self.name, plugin=self.plugin, version=self.version)


SERVICES = {
    "etherscan": Service("Etherscan", "ape-etherscan", "0.8.7", etherscan),
    "sourcify": Service("Sourcify", "ape-sourcify", "0.8.1", sourcify),
}


def publish(service: str, publication: Publication, network: Any) -> str:
    """Publish at a service; where it is then.

    Raises:
        PublishingFailed: it cannot be reached, or says no.
    """
    try:
        return SERVICES[service].publish(publication, network)
    except (ApeException, OSError) as error:  # requests' errors are OSErrors
        raise PublishingFailed(service=SERVICES[service].name, reason=str(error)) from error


def by_hand(publication: Publication, explorer: str | None) -> str:
    """How to publish with the services' own web forms and the files that were written."""
    record = publication.record
    return f"""To publish by hand:
  Etherscan: {explorer or "the chain's explorer"}/verifyContract
    contract address      {record.address}
    compiler type         Solidity (Standard-Json-Input)
    compiler version      v{record.compiler.version}
    licence               MIT
    then upload           standard-input.json
    constructor arguments what is in constructor-arguments.txt
  Sourcify: https://verify.sourcify.dev
    chain and address     {record.chain_id}, {record.address}
    method                Standard JSON: upload standard-input.json
    compiler version      {record.compiler.version}
    contract identifier   {IDENTIFIER}
    creation transaction  {record.transaction or "leave it empty"}"""
