"""A development chain in this process (or anvil), with funded accounts: nothing to install, nothing to configure.

```python
from divault.devnet import start_devnet

with start_devnet() as devnet:
    print(devnet.url, devnet.chain_id, devnet.accounts[0].address)
```
"""

from divault.devnet.devnet import DEVNET_CHAIN_ID, MULTICALL, DevAccount, Devnet, start_devnet

__all__ = ["DEVNET_CHAIN_ID", "MULTICALL", "DevAccount", "Devnet", "start_devnet"]
