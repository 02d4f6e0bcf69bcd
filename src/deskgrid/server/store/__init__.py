"""State: a store protocol, one implementation over SQLAlchemy, and all SQL, one file per entity."""
