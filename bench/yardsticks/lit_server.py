"""The same model behind LitServe, as its own examples have it: a worker process, a loop of requests, no user.

python -m bench.yardsticks.lit_server PORT MODEL
"""

import sys
from typing import Any

import joblib
import litserve


class Api(litserve.LitAPI):
    """One row in, its probabilities out."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        """Load the model, in the worker."""
        self.model = joblib.load(sys.argv[2])

    def decode_request(self, request: dict[str, Any]) -> list[float]:
        """The row."""
        features: list[float] = request["features"]
        return features

    def predict(self, x: list[float]) -> list[float]:
        """Its probabilities."""
        probabilities: list[float] = self.model.predict_proba([x])[0].tolist()
        return probabilities

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        """The answer."""
        return {"probabilities": output}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1, healthcheck_path="/up")
    server.run(port=int(sys.argv[1]), host="127.0.0.1", log_level="warning", generate_client_file=False)
