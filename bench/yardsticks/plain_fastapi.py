"""What a developer writes without a framework for models: FastAPI, one route, the model in the process, no user.

python -m bench.yardsticks.plain_fastapi PORT MODEL
"""

import sys

import joblib
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

model = joblib.load(sys.argv[2])
app = FastAPI()


class Body(BaseModel):
    """The route's input."""

    features: list[float]


@app.get("/up")
async def up() -> dict[str, bool]:
    """Tell that it serves."""
    return {"up": True}


@app.post("/predict")
async def predict(body: Body) -> dict[str, list[float]]:
    """One row."""
    return {"probabilities": model.predict_proba([body.features])[0].tolist()}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
