"""Reads the layouts in which others keep recordings and chats, and writes rawloop's data files from them."""
