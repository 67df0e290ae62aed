"""Find: graphs come in, findings go out: norms and what feeds them, sums and their kinds, places for a scalar."""
