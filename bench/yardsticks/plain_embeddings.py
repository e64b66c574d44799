"""The same for sentences: FastAPI, one route, the network in the process, one text at a time.

python -m bench.yardsticks.plain_embeddings PORT FOLDER
"""

import sys

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModel, PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2] + "/tokenizer.json", pad_token="[PAD]")
model = AutoModel.from_pretrained(sys.argv[2]).eval()
app = FastAPI()


class Body(BaseModel):
    """The route's input."""

    text: str


@app.get("/up")
def up() -> dict[str, bool]:
    """Tell that it serves."""
    return {"up": True}


@app.post("/embed")
def embed(body: Body) -> dict[str, list[float]]:
    """One text, on a thread of the server's."""
    encoded = tokenizer([body.text], return_tensors="pt")
    with torch.inference_mode():
        hidden = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).last_hidden_state
        return {"embedding": torch.nn.functional.normalize(hidden.mean(1))[0].tolist()}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
