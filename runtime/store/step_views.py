"""Two views for people: `episode_text` reads like a transcript, `step_summary` has one line a step.

    sqlite3 -column state/agent.db "select speaker, text from episode_text where episode_id = '...'"

Plain SQL over the JSON columns, so that the sqlite3 shell and Datasette show them without a line of our Python.
Refused: a text column beside the JSON, which could disagree with it.

Not covered: a branching episode is shown in order of time, not branch by branch; an integer of more than 64 bits is
shown rounded.
"""

from __future__ import annotations


def _call_text(path: str) -> str:
    """SQL for the call at a path of `call.value`, as one would write it: `pick(item="mug", count=2)`.

    Arguments that are no object (an imported message may hold anything) stand as they are.
    """
    name, arguments = (f"json_extract(call.value, '{path}.{field}')" for field in ("name", "arguments"))
    pairs = f"""(SELECT group_concat(argument.key || '=' || CASE argument.type
            WHEN 'text' THEN json_quote(argument.value) WHEN 'null' THEN 'null'
            WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' ELSE argument.value END, ', ')
        FROM json_each({arguments}) AS argument)"""
    is_object = f"CASE WHEN json_valid({arguments}) THEN json_type({arguments}) = 'object' END"
    return (
        f"coalesce({name}, '?') || '(' || coalesce(CASE WHEN {is_object} THEN {pairs} ELSE {arguments} END, '') || ')'"
    )


# What a message says: its content is a string, null, or a list of parts, of which only the texts can be shown.
_CONTENT_TEXT = """CASE json_type(message.value, '$.content')
        WHEN 'array' THEN (
            SELECT group_concat(coalesce(json_extract(part.value, '$.text'),
                                         '[' || json_extract(part.value, '$.type') || ']'), ' ')
            FROM json_each(message.value, '$.content') AS part)
        ELSE json_extract(message.value, '$.content') END"""

# The results of server-run tools are shown with the step that ran them, not again where the next step sees them.
_SHOWN_WITH_PARENT = """EXISTS (
        SELECT 1 FROM steps AS parent, json_each(parent.tool_results) AS result
        WHERE parent.id = steps.parent_id AND json_extract(message.value, '$.role') = 'tool'
          AND json_extract(result.value, '$.tool_call_id') = json_extract(message.value, '$.tool_call_id'))"""

# Every arm yields its lines of the transcript and where they stand: by step, then part of the step, then line.
_LINES = f"""
    SELECT episode_id, created_at, steps.id AS step_id, step_index, 0 AS part, message.key AS line,
           json_extract(message.value, '$.role') AS speaker, {_CONTENT_TEXT} AS text
    FROM steps, json_each(steps.new_messages) AS message
    WHERE NOT {_SHOWN_WITH_PARENT}
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 0, message.key + 0.5,
           json_extract(message.value, '$.role'),
           {_call_text("$.function")}
    FROM steps, json_each(steps.new_messages) AS message, json_each(message.value, '$.tool_calls') AS call
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -3, 'agent', '(thinks) ' || json_extract(action, '$.reasoning')
    FROM steps WHERE json_extract(action, '$.reasoning') <> ''
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -2, 'agent', json_extract(action, '$.text')
    FROM steps
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -1, 'agent', '(malformed) ' || json_extract(action, '$.problem')
    FROM steps
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 1, call.key, 'agent',
           {_call_text("$")}
    FROM steps, json_each(steps.action, '$.calls') AS call
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 2, result.key, 'tool',
           CASE WHEN json_extract(result.value, '$.is_error') THEN '(error) ' ELSE '' END
           || json_extract(result.value, '$.content')
    FROM steps, json_each(steps.tool_results) AS result
  UNION ALL
    SELECT episode_id, 9e999, NULL, NULL, 3, 0, 'outcome',
           value || ' (' || source || ')' || CASE note WHEN '' THEN '' ELSE ' ' || note END
    FROM outcomes
    WHERE NOT EXISTS (
        SELECT 1 FROM outcomes AS later
        WHERE later.episode_id = outcomes.episode_id
          AND (later.created_at, later.id) > (outcomes.created_at, outcomes.id))"""

EPISODE_TEXT = f"""
SELECT lines.episode_id, episodes.task, episodes.adapter, lines.step_index,
       CASE WHEN lines.speaker = 'agent' AND episodes.actor = 'expert' THEN 'expert' ELSE lines.speaker END AS speaker,
       lines.text
FROM ({_LINES}
) AS lines JOIN episodes ON episodes.id = lines.episode_id
WHERE lines.text <> '' OR lines.part = 2
ORDER BY lines.episode_id, lines.created_at, lines.step_id, lines.part, lines.line
"""
"""Episode id, task, adapter, step index, speaker, text: a row for each thing said, called or returned, in order. The
newest outcome is the last line. Empty words are left out, an empty tool result is shown."""

STEP_SUMMARY = """
SELECT id AS step_id, episode_id, parent_id, step_index, adapter, json_extract(action, '$.type') AS action_type,
       (SELECT group_concat(json_extract(call.value, '$.name'), ', ')
        FROM json_each(steps.action, '$.calls') AS call) AS tool_names,
       num_prompt_tokens, num_completion_tokens, finish_reason, stop_reason, first_token_ms, latency_ms, mean_logprob,
       created_at
FROM steps
ORDER BY created_at, id
"""
