"""Plan: findings and what was asked for come in, a frozen plan goes out; every decision is made here."""
