"""The authors' kit: the checks that every provider of a kind must pass, run on yours in one line.

```python
from apt.testing import conformance

test_conformance = conformance("attention.mine", {"r": 4})
```

makes one pytest test of each check. `check_provider` gives the results as values; `apt-core test attention.mine` prints
them. Each check says which law it holds a provider to; what a kind does not promise is not applicable, and is said.
"""

from apt.testing.kit import CHECKS, Check, Report, Result, check_provider, conformance

__all__ = ["CHECKS", "Check", "Report", "Result", "check_provider", "conformance"]
