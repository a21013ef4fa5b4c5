"""Next-item model: tower, item table, losses over the catalogue."""
