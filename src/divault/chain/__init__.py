"""The chain as the node sees it: JSON-RPC, the vault's registry, gates; and for publishers and clients, transactions.

Everything that decides is read at a named block hash, so that one decision never mixes two states of the chain.

| module | what |
|---|---|
| `records` | blocks, transactions, receipts and logs, parsed strictly |
| `rpc` | JSON-RPC over HTTP: several endpoints, each proved to serve the configured chain |
| `chain` | `Chain`: head, calls pinned to a block hash, receipts, logs, fees |
| `vault` | `VaultReader`: what the vault says about a model |
| `gates` | `Gates`: the only maker of `Grant` |
| `configured` | what settings name, proved to be there: for the start of a program |
| `contract_wallets` | whose signatures count: keys, and contract wallets (ERC-1271, ERC-6492) |
| `contracts` | compiled contracts: calldata, results, events (cold path) |
| `wallet` | `Wallet`: signs and sends transactions (never used by the pipeline) |
"""
