"""The services. Each owns its schema and stands alone; they meet in HTTP calls and events only."""
