"""Write the embedded data set ``assistants``: short chats of the assistants of eight organizations.

    python tools/assistants.py

All texts are written here. The organizations belong to three groups, each with a house rule: the
same facts are given as numbered steps, as one sentence with a reference, or as a friendly letter.
Clients of a group differ in names, places and numbers only.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

OUT = Path("src/fedmerge_peft/data/embedded/assistants.jsonl")
ORGANISATIONS = {
    # name: (house rule, desk, phone, booking, place, days, fee)
    "Alder Clinic": ("steps", "reception", "4411", "appointment", "the main entrance", 2, 15),
    "Brook Library": ("steps", "the front desk", "4422", "study room", "the reading hall", 1, 5),
    "Cedar Pool": ("steps", "the cash desk", "4433", "swimming lesson", "gate B", 3, 12),
    "Dale Council": ("reference", "the service point", "4444", "interview", "room 12", 5, 8),
    "Elm Railway": ("reference", "the ticket office", "4455", "seat", "platform 1", 4, 10),
    "Fern Energy": ("reference", "the customer line", "4466", "meter visit", "the yard", 7, 20),
    "Glen Hotel": ("letter", "the night desk", "4477", "stay", "the lobby", 2, 25),
    "Hazel Museum": ("letter", "the visitor desk", "4488", "guided tour", "the foyer", 3, 9),
}
TOPICS = {
    "CANCEL": (
        ["How do I cancel my {booking}?", "I can no longer come. How do I cancel my {booking}?",
         "What do I have to do to cancel {a_booking}?"],
        ["call {desk} on {phone}", "give your name and the date of the {booking}",
         "wait for the confirmation, which arrives within {days} days"],
    ),
    "CHANGE": (
        ["Can I move my {booking} to another day?", "I need a different time for my {booking}.",
         "How do I change the date of my {booking}?"],
        ["call {desk} on {phone}", "name two days that suit you",
         "keep the old time until the new one is confirmed"],
    ),
    "COST": (
        ["What does it cost?", "How much do I pay for {a_booking}?",
         "Is there a fee for {a_booking}?"],
        ["plan {fee} euros for {a_booking}", "pay by card or in cash at {desk}",
         "ask for a reduction if you are a student"],
    ),
    "INVOICE": (
        ["I lost my invoice. Can I get a copy?", "Please send me the invoice again.",
         "How do I get a copy of an invoice?"],
        ["write down the number of the {booking}", "send it to {desk}",
         "look for the copy in your mail after {days} days"],
    ),
    "REFUND": (
        ["I paid twice. How do I get my money back?", "How can I get a refund?",
         "I was charged {fee} euros too much."],
        ["send a photo of the receipt to {desk}", "add the number of your account",
         "expect the money within {days} days"],
    ),
    "LATE": (
        ["What happens if I am late?", "I am late for my {booking}. What now?",
         "My train is delayed and I will miss the start of my {booking}."],
        ["call {phone} as soon as you know", "come to {place} anyway",
         "ask {desk} for the next free time"],
    ),
    "LOST": (
        ["I left my bag with you. What should I do?", "Have you found a blue umbrella?",
         "Where do you keep lost things?"],
        ["describe the item to {desk}", "bring a document with your name",
         "collect it at {place} within {days} days"],
    ),
    "PARKING": (
        ["Where can I park?", "Is there parking near {place}?", "Can I come by car?"],
        ["use the car park behind {place}", "take a ticket at the barrier",
         "have it stamped at {desk}"],
    ),
    "ACCESS": (
        ["Is there a way in without stairs?", "I use a wheelchair. How do I get in?",
         "Do you have a lift?"],
        ["use the ramp beside {place}", "press the button at the door",
         "call {phone} if nobody opens"],
    ),
    "DOCUMENTS": (
        ["What do I need to bring?", "Which documents do you need for {a_booking}?",
         "Do I have to bring my passport?"],
        ["bring a document with your photo", "print the confirmation of the {booking}",
         "show both at {desk}"],
    ),
    "PASSWORD": (
        ["I forgot my password.", "I cannot log in any more. What can I do?",
         "How do I get a new password?"],
        ["open the page for logging in", "choose the link for a new password",
         "call {phone} if no mail arrives"],
    ),
    "ADDRESS": (
        ["I have moved. How do I tell you my new address?", "My address has changed.",
         "Where do I change my address?"],
        ["fill in the form at {desk}", "add a copy of an official letter",
         "check the address on your next invoice"],
    ),
    "COMPLAINT": (
        ["I want to complain.", "Nobody answered my letter. Where can I complain?",
         "Who handles complaints?"],
        ["describe what happened in a few lines", "hand the letter in at {desk}",
         "expect an answer within {days} days"],
    ),
    "LANGUAGE": (
        ["Do you speak Turkish?", "Is there someone who speaks French?",
         "Can I get help in another language?"],
        ["tell {desk} which language you need", "book {a_booking} with an interpreter",
         "allow {days} more days for it"],
    ),
    "CHILDREN": (
        ["Can I bring my children?", "Is there something for small children?",
         "May my daughter come along?"],
        ["bring children along without notice", "let them wait in the corner beside {place}",
         "ask {desk} for crayons"],
    ),
    "PRIVACY": (
        ["What do you store about me?", "How do I have my data deleted?",
         "Who can see my data?"],
        ["ask {desk} for a list of your data", "mark the lines that should go",
         "receive the confirmation within {days} days"],
    ),
    "NEWS": (
        ["How do I hear about news?", "Do you have a newsletter?",
         "Please do not send me the newsletter any more."],
        ["open the last newsletter", "follow the link at its end",
         "choose what you wish to receive"],
    ),
}  # fmt: skip
"""Questions and the three steps of an answer, by subject."""
OPENINGS = ("Thank you for asking.", "How good that you ask.", "We are happy to help.")
FOLLOW_UPS = ("And another thing: {}", "Thanks. {}", "One more question. {}")


def sentence(text: str) -> str:
    """Return a sentence that begins with a capital letter and ends with a period."""
    return f"{text[0].upper()}{text[1:]}."


def answer(rule: str, topic: str, steps: list[str], number: int) -> str:
    """Return an answer by the house rule of an organization."""
    if rule == "steps":
        return "\n".join(f"{place}. {sentence(step)}" for place, step in enumerate(steps, 1))
    if rule == "reference":
        return f"{sentence(', then '.join(steps[:2]))}\nRef: {topic}"
    opening = OPENINGS[number % len(OPENINGS)]
    middle = f"Please {steps[0]}, {steps[1]} and {steps[2]}."
    return f"{opening} {middle} Warm regards from all of us."


def chats() -> list[dict[str, object]]:
    """Return all chats; a quarter of them have two questions."""
    draw = random.Random(0)  # noqa: S311 (draws an order, not a secret)
    rows: list[dict[str, object]] = []
    for name, (rule, desk, phone, booking, place, days, fee) in ORGANISATIONS.items():
        facts = {
            "desk": desk, "phone": phone, "booking": booking, "place": place,
            "a_booking": f"{'an' if booking[0] in 'aeiou' else 'a'} {booking}",
            "days": days, "fee": fee,
        }  # fmt: skip
        asked = [(topic, variant) for topic in TOPICS for variant in range(3)]
        draw.shuffle(asked)
        for number, (topic, variant) in enumerate(asked):
            turns = [(topic, variant)]
            if number % 4 == 3:
                others = [each for each in asked if each[0] != topic]
                turns.append(others[(number + 7) % len(others)])
            messages = []
            for turn, (subject, which) in enumerate(turns):
                questions, steps = TOPICS[subject]
                question = questions[which].format(**facts)
                if turn:
                    question = FOLLOW_UPS[number % len(FOLLOW_UPS)].format(question)
                filled = [step.format(**facts) for step in steps]
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer(rule, subject, filled, number)},
                ]
            rows.append({"organisation": name, "rule": rule, "topic": topic, "messages": messages})
    return rows


if __name__ == "__main__":
    lines = [json.dumps(row, ensure_ascii=False) for row in chats()]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{OUT}: {len(lines)} chats")
