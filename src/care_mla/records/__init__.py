"""Everything that is saved: frozen records, each field with its unit and meaning, and the names of their files. No torch."""
