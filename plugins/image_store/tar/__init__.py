"""What a verified layer's tar says, as a tree in memory."""
