"""Other libraries, each imported only by its own module here."""
