"""Registered versions: registration, promotion, verification, export."""
