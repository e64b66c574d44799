"""Three lines from a wallet to a verified answer.

    from divault import Client
    client = Client("http://127.0.0.1:8000", key="0x...", rpc="http://127.0.0.1:8545")
    print(client.run("breast-cancer", {"features": [...]}, max_price="0.02").output)

Rules:

1. The node must prove that it is the one asked for: its descriptor is signed, its address pinned (`node=`) or
   remembered from the first use. Its receipts must come from the same address.
2. Nothing is paid unless `max_price` covers it, and only what the vault itself says: owner, price and token are read
   from the chain, never taken from the node's offer.
3. A paid call is repeated with the same bytes, so it can't be charged twice; a free one is signed anew.
4. An answer is returned only after its receipt was verified against the request and the answer's own bytes.
5. After a payment no error forgets it: it names the transaction, and the next run of the same model draws on it.
"""

from divault.client.asynchronous import AsyncClient, Login, NodeInfo, Result
from divault.client.sync import Client

__all__ = ["AsyncClient", "Client", "Login", "NodeInfo", "Result"]
