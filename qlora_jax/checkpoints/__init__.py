"""File formats to parameter trees and back: Hugging Face folders, GGUF, PEFT adapters."""
