"""EarlyBERT: a search for the heads and neurons worth training, in the first steps of a run (arXiv:2101.00063)."""

from .gates import Gates, add_gates_, close_gates_, gates_of, remove_gates_
from .ticket import TICKET_SCORES, Ticket, TicketDistance, draw_ticket, random_ticket, ticket_distance, tied_share


__all__ = [
    "TICKET_SCORES",
    "Gates",
    "Ticket",
    "TicketDistance",
    "add_gates_",
    "close_gates_",
    "draw_ticket",
    "gates_of",
    "random_ticket",
    "remove_gates_",
    "ticket_distance",
    "tied_share",
]
