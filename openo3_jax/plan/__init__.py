"""Know before you rent: compile a recipe for chips that need not be here, and say what it takes."""
