"""The first rows of each published trace layout."""

from pathlib import Path

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951690,879,55
"""
# The conversation trace of 2024 mixes timestamps with and without decimals.
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-11 23:59:59.988837+00:00,1452,3
2024-05-12 00:00:00+00:00,584,3
2024-05-12 00:00:00.157988+00:00,862,38
"""
BURSTGPT_1 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
60,GPT-4,300,0,300,API log
75,GPT-4,0,0,0,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82-0a46-4bf0-aa08-89794e7a2b3f,43,GPT-4,906,446,1352,Conversation log
19440161.0,,2,ChatGPT,36,29,65,API log
"""
MOONCAKE_2025 = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 7322, "output_length": 490, "hash_ids": []}
{"timestamp": 3052, "input_length": 2290, "output_length": 316}
"""


def write(folder: Path, content: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
