"""What runs a model: one protocol, and one class per inference engine behind it."""
