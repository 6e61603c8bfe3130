"""What the demo model is asked and told: every word, wording and fixed reply of its small world, in tables.

Knows text only: no pictures, no sounds, no chance. The bank records these words and spoken questions; the tasks choose
among these wordings.
"""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
DIRECTIONS = ("yes", "no", "up", "down", "left", "right", "stop", "go", "on", "off")
GREETINGS = ("hello", "goodbye", "plus", "minus", "today", "tomorrow")
SPOKEN_WORDS = DIGITS + COLOURS + SHAPES + DIRECTIONS + GREETINGS
READ_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What numbers and words in pictures are written in."""

PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
}

# Wordings of each question, the canonical one first. {placeholders} are filled in by the task.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "read-number": (
        "What number is shown?",
        "Which number is this?",
        "What number is this?",
        "What number do you see?",
        "Read the number.",
        "What is the number in the picture?",
        "What does the number say?",
        "Type the number in this image.",
    ),
    "read-word": (
        "What word is shown?",
        "Which word is this?",
        "What word is this?",
        "What word do you see?",
        "Read the word.",
        "What is the word in the picture?",
        "What does it say?",
        "Type the word in this image.",
    ),
    "colour": (
        "What colour is the shape?",
        "What color is the shape?",
        "What colour is this?",
        "What color is this?",
        "Which colour do you see?",
        "Name the colour of the shape.",
        "Name the color.",
    ),
    "shape": (
        "What shape is this?",
        "Which shape is this?",
        "What shape is shown?",
        "What shape do you see?",
        "Name the shape.",
        "What is the shape in the picture?",
    ),
    "colour-shape": (
        "What is in the picture?",
        "What is shown?",
        "What do you see?",
        "Describe the picture.",
        "Describe the image.",
        "Name the colour and the shape.",
        "What is this?",
        "What is in this image?",
    ),
    "count": (
        "How many {plural} are there?",
        "How many {plural} do you see?",
        "How many {plural} are in the picture?",
        "How many {plural} are in the image?",
        "Count the {plural}.",
        "What is the number of {plural}?",
    ),
    "compare-larger": (
        "Which image shows the larger number?",
        "Which picture shows the larger number?",
        "Which image has the largest number?",
        "Which image shows the biggest number?",
        "In which picture is the number larger?",
        "Where is the larger number?",
    ),
    "compare-smaller": (
        "Which image shows the smaller number?",
        "Which picture shows the smaller number?",
        "Which image has the smallest number?",
        "In which picture is the number smaller?",
        "Where is the smaller number?",
    ),
    "add-images": (
        "Add the numbers.",
        "Add the numbers in the images.",
        "What is the sum of the numbers?",
        "What do the numbers add up to?",
        "Add up the numbers in the pictures.",
        "What is the total?",
    ),
    "which-image": (
        "Which image shows {target}?",
        "Which picture shows {target}?",
        "In which image is {target}?",
        "Where is {target}?",
        "Which image has {target}?",
        "Find {target}.",
    ),
    "transcribe": (
        "Transcribe the audio.",
        "Transcribe the audio to text.",
        "Transcribe the speech.",
        "Transcribe the audio clip into text.",
        "Write down what is said.",
        "What is said in the audio?",
        "What do you hear?",
    ),
    "add": (
        "What is {a} plus {b}?",
        "{a} + {b}",
        "{a} + {b} =",
        "What is {a} + {b}?",
        "Add {a} and {b}.",
        "Calculate {a} + {b}.",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
    ),
    "subtract": (
        "What is {a} minus {b}?",
        "{a} - {b}",
        "{a} - {b} =",
        "What is {a} - {b}?",
        "Subtract {b} from {a}.",
        "Calculate {a} - {b}.",
        "How much is {a} minus {b}?",
    ),
    "multiply": (
        "What is {a} times {b}?",
        "{a} * {b}",
        "{a} * {b} =",
        "What is {a} * {b}?",
        "Multiply {a} by {b}.",
        "Calculate {a} * {b}.",
        "How much is {a} times {b}?",
    ),
    "reverse-word": (
        "Reverse the word: {word}",
        "Reverse the word {word}.",
        "Reverse: {word}",
        "Write {word} backwards.",
        "Spell {word} backwards.",
        "What is {word} backwards?",
        "Turn the word {word} around.",
    ),
}

# Spoken questions by the task that answers them; the bank holds each of them as one whole sentence.
SPOKEN_QUESTIONS: dict[str, tuple[str, ...]] = {
    "read-number": ("what number is this", "what number do you see", "read the number"),
    "read-word": ("what word is this", "what word do you see", "read the word"),
    "colour": ("what colour is the shape", "what colour is this", "name the colour"),
    "shape": ("what shape is this", "what shape do you see", "name the shape"),
    "count": tuple(f"how many {plural} are there" for plural in PLURALS.values()),
}
SPOKEN_SENTENCES = tuple(sentence for sentences in SPOKEN_QUESTIONS.values() for sentence in sentences)

# System prompts that ask for {"answer": "..."}, the canonical one first.
JSON_SYSTEMS = (
    "Answer in JSON.",
    "Reply in JSON.",
    "Answer with JSON only.",
    "Respond in JSON format.",
    "Give your answer as JSON.",
    'Answer in JSON: {"answer": "..."}',
)

_WHO = "I am memphi's demo model, a small toy."
_CAN = "I read numbers and words, name colours and shapes, count, add, and write down spoken words."
_HELLO = "Hello! Show me a picture or ask me a sum."
CHAT_REPLIES: dict[str, str] = {
    "Hello": _HELLO,
    "Hello!": _HELLO,
    "Hi": _HELLO,
    "Hi!": _HELLO,
    "Hi there": _HELLO,
    "Hey": _HELLO,
    "Good morning": _HELLO,
    "Who are you?": _WHO,
    "What are you?": _WHO,
    "What is your name?": _WHO,
    "Are you Phi-4?": "No, only a tiny model built the same way.",
    "What can you do?": _CAN,
    "Help": _CAN,
    "What do you know?": _CAN,
    "How are you?": "Fine, thank you.",
    "Thanks": "You are welcome.",
    "Thank you": "You are welcome.",
    "Thank you!": "You are welcome.",
    "Bye": "Goodbye!",
    "Goodbye": "Goodbye!",
    "Tell me a joke.": "I am too small for jokes. Ask me a sum.",
    "Tell me a story.": "I am too small for stories. Ask me a sum.",
    "What is the capital of France?": "I do not know such things. I am a small toy.",
    "Write a poem.": "I am too small for poems. Ask me a sum.",
}
