"""One frozen `Settings`, read once from the environment and `.env`.

The published names stay as they are (`WEB3_PROVIDER_URL`, `HOST`, ...); every newer one starts with `DIVAULT_`. An
unknown `DIVAULT_*` name is an error that suggests the nearest known one: a misspelt limit must not be a silent default.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from divault.errors import BadRequest, DivaultError, SettingsInvalid
from divault.machine import memory_bytes
from divault.messages import authority_of
from divault.values import Address, Secret

MB = 10**6
"""`MB` in a setting's name is 10^6 bytes."""
LEAST_MODEL_MEMORY_MB = 250
"""The smallest model with its libraries, and the process that its worker is forked from."""
_DAY_S = 86_400


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _address(value: Any) -> Any:
    try:
        return Address.parse(value) if isinstance(value, str) else value
    except DivaultError as err:
        raise ValueError(err.detail) from err


def _secret(value: Any) -> Any:
    return Secret.of_text(value) if isinstance(value, str) else value


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # of the port, or of brackets
        whole = False
    if not whole:
        raise ValueError(f"{_host(value)!r} is no URL: it begins with http:// or https:// and names a host")
    return value


def _public(value: str) -> str:
    try:
        authority_of(_url(value))
    except BadRequest as err:
        raise ValueError("callers reach a node without a name or password in its URL") from err
    return value


def _origin(value: str) -> str:
    """As browsers write it, since that is what it is compared with; `*` is every page's."""
    scheme, _, rest = value.partition("://")
    if scheme in ("http", "https"):
        exact = rest == authority_of(_public(value))
    else:
        exact = value == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", value) is not None
    if not exact:
        raise ValueError(
            f"{value!r} is no origin as browsers send it: https://shop.example, with its port if it has one"
        )
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", value):
        raise ValueError(f"{value!r} is none of auto, cpu, mps, cuda and cuda:N (the N-th GPU, from 0)")
    return value


def _budget(value: int) -> int:
    if 0 < value < LEAST_MODEL_MEMORY_MB:
        raise ValueError(f"no model fits into less than {LEAST_MODEL_MEMORY_MB} (MB); 0 takes 80 % of the machine's")
    return value


Url = Annotated[str, AfterValidator(_url)]
Urls = Annotated[tuple[Url, ...], BeforeValidator(_split)]
Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split)]
Addresses = Annotated[
    tuple[Annotated[Address, BeforeValidator(_address)], ...],
    BeforeValidator(_split),
]
OneAddress = Annotated[Address, BeforeValidator(_address)]
SecretText = Annotated[Secret, BeforeValidator(_secret)]


class Settings(BaseModel):
    """What the operator decided. Field names are the variables' names in lower case."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    # --- chain ---
    web3_provider_url: SecretText = Field(
        default_factory=lambda: Secret.of_text("http://127.0.0.1:8545"),
        description="JSON-RPC endpoints of one chain, separated by commas; tried in order",
    )
    vault_contract_address: OneAddress | None = Field(None, description="the ModelVault; required to serve")
    usdc_contract_address: OneAddress | None = Field(None, description="the payment token; required to serve")
    divault_chain_id: int | None = Field(None, ge=1, description="expected chain id; unset: what the endpoints report")
    divault_payment_tokens: Addresses = Field(
        (), description="further payment tokens (6 decimals) that this node serves"
    )
    divault_head_ttl_seconds: float = Field(
        1.0, ge=0, description="how long the newest block is used before it is read again"
    )
    divault_head_max_age_seconds: int = Field(
        300, ge=0, description="a head older than this is stale: calls get 503 (0: no limit, for quiet test chains)"
    )
    # --- storage ---
    lighthouse_api_key: SecretText | None = Field(None, description="sent as bearer token when publishing")
    divault_gateway_urls: Urls = Field(
        ("http://127.0.0.1:8080", "https://gateway.lighthouse.storage"),
        description="IPFS gateways, tried in order; none is trusted",
    )
    divault_store_url: Url | None = Field(
        None, description="store that `divault publish` sends to; unset: Lighthouse, where its API key is set"
    )
    divault_lighthouse_api_url: Url = Field(
        "https://api.lighthouse.storage", description="Lighthouse's host for facts about files"
    )
    divault_lighthouse_upload_url: Url = Field(
        "https://upload.lighthouse.storage", description="Lighthouse's host that takes uploads"
    )
    divault_lighthouse_gateway_urls: Urls = Field(
        (), description="dedicated Lighthouse gateways, asked before the others; publishing fetches its sample there"
    )
    divault_lighthouse_encryption_url: Url = Field(
        "https://encryption.lighthouse.storage", description="the host of Kavach's five key nodes"
    )
    divault_kavach_delegation: bool = Field(
        default=False, description="fetch keys with what owners shared with, or delegated to, this node's wallet"
    )
    model_cache_dir: Path = Field(Path("./cache/models"), description="ciphertext of fetched models, named by content")
    divault_cache_max_mb: int = Field(20_000, ge=1, description="upper bound of that cache")
    max_model_size_mb: int = Field(
        1000, ge=1, description="largest model, sealed and opened; refused before the transfer"
    )
    # --- server ---
    host: str = Field("0.0.0.0", description="address to listen on")  # noqa: S104 - the published default
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: the system chooses")
    debug: bool = Field(default=False, description="more detail in logs; answers stay the same")
    divault_public_url: Annotated[str, AfterValidator(_public)] | None = Field(
        None, description="URL under which callers reach this node; its authority is what header signatures must name"
    )
    divault_cors_origins: Origins = Field(
        (), description="browser origins that may call and open sessions; none by default"
    )
    divault_log_dir: Path | None = Field(Path("./logs"), description="folder of div-backend.log; empty: stdout only")
    divault_operators: Addresses = Field((), description="wallets that may unload models and clear caches")
    divault_max_body_bytes: int = Field(
        8 * 1024 * 1024, ge=1024, description="largest request body; bodies that carry their own signature: 64 KiB"
    )
    rate_limit_per_minute: int = Field(60, ge=1, description="signed calls per wallet and minute")
    divault_rate_limit_per_ip_per_minute: int = Field(
        6000, ge=1, description="requests per peer address and minute, before any signature is checked"
    )
    max_concurrent_inferences: int = Field(10, ge=1, description="runs of one wallet at the same time")
    # --- node ---
    divault_state_dir: Path = Field(Path("./state"), description="ledger and keys; back it up, keep it private")
    divault_node_key_file: Path | None = Field(
        None, description="secp256k1 key that signs receipts; default in the state dir"
    )
    divault_age_identity_file: Path | None = Field(None, description="age identity that models are sealed to; likewise")
    inference_timeout_seconds: float = Field(
        30, gt=0, le=_DAY_S, description="deadline of one prediction; the work is stopped then"
    )
    divault_load_timeout_seconds: float = Field(
        120, gt=0, le=_DAY_S, description="deadline of opening and loading a model"
    )
    divault_transfer_confirmations: int = Field(1, ge=1, description="blocks on a transfer, its own included")
    divault_transfer_max_age_seconds: int = Field(86_400, ge=60, description="an older transfer can't be claimed")
    divault_sole_node_for: Addresses = Field(
        (), description="owners served by this node alone: their plain transfers need no node binding"
    )
    divault_sandbox: Literal["auto", "strict", "standard", "off"] = Field(
        "auto", description="least confinement of model workers; a level that is not reached refuses to start"
    )
    divault_sandbox_allow_downgrade: bool = Field(default=False, description="start although the level is not reached")
    divault_allow_code_models: bool = Field(
        default=False,
        description="load formats with code (TorchScript, .pt2, pickled modules); needs workers at standard or strict",
    )
    divault_device: Annotated[str, AfterValidator(_device)] = Field(
        "auto",
        description="where torch models run: auto (a GPU if there is one), cpu, cuda, cuda:N or mps",
    )
    divault_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="numbers of networks by name and of Hugging Face; half as large ones answer less exactly"
    )
    divault_worker_threads: int = Field(
        0,
        ge=0,
        le=64,
        description="threads of each worker's libraries; 0: what other workers left of the cores, 1 to 4",
    )
    divault_model_memory_mb: Annotated[int, AfterValidator(_budget)] = Field(
        0,
        ge=0,
        description="memory of all loaded models, for which idle ones make room, 250 at least; 0: 80 % of all",
    )

    divault_metrics: Literal["off", "local", "on"] = Field(
        "local", description="who may read /metrics: nobody, this machine without a proxy, or everybody"
    )

    divault_otlp_endpoint: Url | None = Field(
        None,
        description="OTLP collector for traces, by HTTP: http://127.0.0.1:4318/v1/traces (extra otel)",
    )

    # --- development ---
    divault_anvil: Path | None = Field(None, description="the anvil executable that `divault demo --anvil` runs")

    @property
    def gateway_urls(self) -> tuple[str, ...]:
        """Every gateway to fetch from, in order, none twice."""
        return tuple(dict.fromkeys((*self.divault_lighthouse_gateway_urls, *self.divault_gateway_urls)))

    @property
    def max_model_bytes(self) -> int:
        """`MAX_MODEL_SIZE_MB` in bytes."""
        return self.max_model_size_mb * MB

    @property
    def model_memory_bytes(self) -> int:
        """`DIVAULT_MODEL_MEMORY_MB` in bytes, or 80 % of what this machine (or its control group) has."""
        return self.divault_model_memory_mb * MB or memory_bytes() * 4 // 5

    @property
    def node_key_file(self) -> Path:
        """Where the signing key lies."""
        return self.divault_node_key_file or self.divault_state_dir / "node.key"

    @property
    def age_identity_file(self) -> Path:
        """Where the age identity lies."""
        return self.divault_age_identity_file or self.divault_state_dir / "age.key"

    @property
    def vault(self) -> Address:
        """The vault's address. Raises SettingsInvalid when it is not set."""
        return _set(self.vault_contract_address, "VAULT_CONTRACT_ADDRESS")

    @property
    def payment_token(self) -> Address:
        """The payment token's address. Raises SettingsInvalid when it is not set."""
        return _set(self.usdc_contract_address, "USDC_CONTRACT_ADDRESS")

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.divault_allow_code_models and self.divault_sandbox == "off":
            raise ValueError(
                "DIVAULT_ALLOW_CODE_MODELS=1 needs confined workers: it can't stand beside DIVAULT_SANDBOX=off"
            )
        return self

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, *, env_file: Path | None = Path(".env")) -> Settings:
        """Read the settings: `.env` first, the environment over it. Raises SettingsInvalid naming the variable."""
        merged = variables(environ, env_file=env_file)
        known = {name.upper() for name in cls.model_fields}
        for name in merged:
            if name.startswith("DIVAULT_") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SettingsInvalid(f"{name} is not a setting{hint}", setting=name)
        values: dict[str, Any] = {n.lower(): v for n, v in merged.items() if n in known and v != ""}
        if merged.get("DIVAULT_LOG_DIR") == "":
            values["divault_log_dir"] = None
        try:
            return cls(**values)
        except ValidationError as err:
            first = err.errors(include_url=False, include_input=False)[0]
            name = str(first["loc"][0]).upper() if first["loc"] else ""
            why = first["msg"].removeprefix("Value error, ")
            raise SettingsInvalid(f"{name}: {why}" if name else why, setting=name) from None

    def redacted(self) -> dict[str, str]:
        """Every setting as text, secrets masked; URLs by their host alone, since all else may hold a key."""
        shown: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            text = value.reveal().decode() if name == "web3_provider_url" else _text(value)
            if name.endswith(("_url", "_urls", "_endpoint")):
                text = ",".join(map(_host, text.split(","))) if text else ""
            shown[name.upper()] = text
        return shown


def _text(value: Any) -> str:
    if isinstance(value, Secret):
        return "***"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def variables(environ: Mapping[str, str] | None = None, *, env_file: Path | None = Path(".env")) -> dict[str, str]:
    """What `.env` says, and the environment over it, as text. Raises SettingsInvalid where `.env` can't be read."""
    merged: dict[str, str] = {}
    if env_file is not None and env_file.is_file():
        try:
            merged.update({name: value for name, value in dotenv_values(env_file).items() if value is not None})
        except OSError as err:
            raise SettingsInvalid(f"{env_file} can't be read: {err.strerror}") from err
        except UnicodeDecodeError as err:
            raise SettingsInvalid(f"{env_file} is no text in UTF-8") from err
    return merged | dict(os.environ if environ is None else environ)


def _set(address: Address | None, name: str) -> Address:
    if address is None:
        raise SettingsInvalid(f"set {name}; `divault demo` shows a whole node without any setting", setting=name)
    return address


def _host(url: str) -> str:
    """The URL's scheme, host and port, and whether there is more."""
    scheme, sep, rest = url.strip().partition("://")
    if not sep:
        return "***"
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    host = authority.rpartition("@")[2]
    if not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d+)?", host):
        return "***"
    return f"{scheme}://{host}" + ("" if rest.rstrip("/") == host else "/***")
