"""Control of a draft while it is drafted: when to stop, and which draft goes on, learned on recorded texts."""
