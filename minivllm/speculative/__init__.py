"""Speculative decoding: proposers of drafts, and the rule that keeps the target's distribution exactly."""
