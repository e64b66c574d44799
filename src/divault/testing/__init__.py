"""What tests of programs that use divault need: a real chain with the contracts deployed and wallets that have funds.

Nothing here imports pytest. In a test:

```python
async with TestChain.start() as chain:
    model = await chain.register("m1", "bafkrei...", price=Usdc.parse("0.02"), minimum=100)
    consumer = await chain.wallet(tokens=100, usdc=Usdc.parse("1"))
```
"""

from divault.testing.chain import TestChain
from divault.testing.lighthouse import LighthouseDouble

__all__ = ["LighthouseDouble", "TestChain"]
