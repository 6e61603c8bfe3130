"""The ledger: how many bytes may be held, and by which account. Integers only; admission and the engine write in it."""


class Budget:
    """Bytes held by accounts, never granted beyond a total."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._accounts: dict[str, int] = {}
        self._held_bytes = 0

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def available_bytes(self) -> int:
        """What may still be charged; negative after a resize to less than is held."""
        return self._total_bytes - self._held_bytes

    def accounts(self) -> dict[str, int]:
        """What each account holds, those with nothing left out."""
        return dict(self._accounts)

    def charge(self, account: str, n_bytes: int) -> bool:
        """Hold bytes for an account; False, and no change, where they do not fit."""
        assert n_bytes >= 0, f"{account} would be charged {n_bytes} bytes"
        if n_bytes > max(self.available_bytes, 0):
            return False
        self._add(account, n_bytes)
        return True

    def release(self, account: str, n_bytes: int) -> None:
        """Give bytes of an account back; AssertionError for more than it holds."""
        assert n_bytes >= 0, f"{account} would release {n_bytes} bytes"
        self._add(account, -n_bytes)

    def move(self, source: str, target: str, n_bytes: int) -> None:
        """Hand bytes from one account to another; what is held stays equal."""
        self.release(source, n_bytes)
        self._add(target, n_bytes)

    def resize(self, total_bytes: int) -> None:
        """Change the total, also to less than is held: then nothing is granted until enough is released."""
        self._total_bytes = total_bytes

    def check(self) -> None:
        """AssertionError unless the sums are right."""
        assert self._held_bytes == sum(self._accounts.values()), "held bytes are not the sum of the accounts"
        assert all(n_bytes > 0 for n_bytes in self._accounts.values()), "an account holds nothing or less"

    def _add(self, account: str, n_bytes: int) -> None:
        left = self._accounts.get(account, 0) + n_bytes
        assert left >= 0, f"{account} would hold {left} bytes"
        self._held_bytes += n_bytes
        if left:
            self._accounts[account] = left
        else:
            self._accounts.pop(account, None)
