"""Bodies of successful answers: supersets of the published ones, without a key or a path in them."""

from __future__ import annotations

from typing import Any

from divault.health import Check
from divault.service import LoadResult
from divault.values import GateType, ModelInfo
from divault.workers.pool import Loaded


def vault_view(info: ModelInfo, total: int) -> dict[str, Any]:
    """Show what the vault says of a model; `total` counts this node's receipts of status 1 for it."""
    return {
        "cid": info.cid,
        "token_contract": str(info.token),
        "price_per_inference": info.price.atomic,
        "price": str(info.price.atomic),
        "price_usdc": str(info.price),
        "payment_token": str(info.payment_token),
        "owner": str(info.owner),
        "active": info.active,
        "total_inferences": total,
        "version": info.version,
        "tags": list(info.tags),
        "min_token_balance": str(info.min_balance),
        "gate": gate_sentence(info),
        "created_at": info.created_at,
        "updated_at": info.updated_at,
    }


def gate_sentence(info: ModelInfo) -> str:
    """Say in words what opens the gate."""
    if info.gate is GateType.OPEN:
        return "open to every wallet"
    return f"a balance of at least {info.min_balance} raw units of the token {info.token}"


def worker_view(loaded: Loaded) -> dict[str, Any]:
    """Show what the worker says of a loaded model."""
    return {
        "model_id": loaded.model.text,
        "type": loaded.description.format,
        "loaded_at": loaded.loaded_at,
        "device": loaded.description.device,
        "state": loaded.state,
        "format": loaded.description.format,
        "task": loaded.description.task,
        "carries_code": loaded.description.code,
        "input_schema": loaded.description.input_schema,
        "output_schema": loaded.description.output_schema,
        "example": loaded.description.example,
        "bytes": loaded.bytes,
        "sandbox": loaded.sandbox,
        "runtime": loaded.description.runtime,
    }


def load_view(result: LoadResult, total: int) -> dict[str, Any]:
    """Answer `models/load`."""
    loaded = result.loaded
    message = f"{result.model.model} is loaded"
    return {
        "status": "success",
        "message": message,
        "model_id": result.model.model.text,
        "model_info": vault_view(result.model, total),
        "load_result": {
            "status": "success",
            "message": message,
            "model_type": loaded.description.format,
            "device": loaded.description.device,
            "bytes": loaded.bytes,
            "sandbox": loaded.sandbox,
            "seconds": loaded.seconds,
        },
    }


def health_view(checks: tuple[Check, ...], sandbox: dict[str, Any], version: str) -> dict[str, Any]:
    """Answer `/health`."""
    failed = [check.name for check in checks if not check.ok]
    return {
        "status": "unhealthy" if failed else "healthy",
        "message": f"failed: {', '.join(failed)}" if failed else "all parts answered",
        "services": {check.name: check.word for check in checks},
        "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail, "checked_at": c.checked_at} for c in checks],
        "sandbox": sandbox,
        "version": version,
    }
