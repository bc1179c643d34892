"""Everything that is not public: nine rooms, each a floor that imports only from those below it."""
