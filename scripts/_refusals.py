"""What deploying, verifying and registering refuse: the docstring is the message, as everywhere in Waterfall."""

from waterfall.errors import WaterfallError


class Refused(WaterfallError):
    """{reason}."""

    code = "refused"


class UnknownChain(Refused):
    """Waterfall knows no USDC on chain {chain_id}: name a 6-decimal token with --token."""

    code = "unknown_chain"


class WrongChain(Refused):
    """The node is on chain {found}, but {claimant} says chain {claimed}."""

    code = "wrong_chain"


class TokenRefused(Refused):
    """{token} cannot back a vault on chain {chain_id}: {reason}."""

    code = "token_refused"


class FactoryMissing(Refused):
    """Chain {chain_id} lacks the deployment proxy {factory}: docs/deploy.md says how anybody can put it there."""

    code = "factory_missing"


class AccountNeeded(Refused):
    """Say who sends it with --account ALIAS: `ape accounts list` shows yours, `ape accounts generate` makes one."""

    code = "account_needed"


class InsufficientGas(Refused):
    """{account} has {balance} of the chain's own coin, and this may cost up to {needed}: send it some."""

    code = "insufficient_gas"


class ChainRefuses(Refused):
    """The chain would not carry this out: {reason}."""

    code = "chain_refuses"


class NotMined(Refused):
    """{transaction} was sent, but is not confirmed after {seconds} s: run the same command again later."""

    code = "not_mined"


class CannotCompile(Refused):
    """The sources do not compile: {reason}."""

    code = "cannot_compile"


class ArtifactStale(Refused):
    """The committed artifact of {name} is not what the sources compile to: {what} differ. Run `ape run artifacts`."""

    code = "artifact_stale"


class RecordDiffers(Refused):
    """{file} tells of another deployment, {reason}: name another file with --out."""

    code = "record_differs"


class SourcesDiffer(Refused):
    """These are not the sources of the vault at {address}: {reason}."""

    code = "sources_differ"


class PlatformExists(Refused):
    """Platform {platform} exists: owner {owner}, payout {payout}, exit delay {exit_delay_seconds} s. Take another --salt."""

    code = "platform_exists"


class PublisherMissing(Refused):
    """Publishing to {service} needs {plugin}, which is not installed: `pip install "{plugin}=={version}"`."""

    code = "publisher_missing"


class PublishingFailed(Refused):
    """{service} did not take the sources: {reason}."""

    code = "publishing_failed"
