--- @include lib/basics/counters
--- @include lib/checkpoint/history
--- @include lib/queue/forget
--- @include lib/queue/live_again
--- @include lib/rq/registries

-- Prepare an ended request that somebody has put into its queue again: its checkpoint stays, all counts begin again.
local function begin_anew(id, queue, verdict)
  local name = KEY.job .. id
  leave_registries(queue, id)
  -- A finish writes no line of history, because the hash has its dates. Now the hash loses them: the line follows.
  local result = verdict == 'finished' and redis.call('XREVRANGE', KEY.results .. id, '+', '-', 'COUNT', 1)[1]
  if result then
    local fields = {}
    for i = 1, #result[2], 2 do fields[result[2][i]] = result[2][i + 1] end
    history(id, 'finished', fields.worker_name, fields.execution_id, '0', '', '', nil, string.match(result[1], '^%d+'))
  end
  live_again(id)
  -- started_at too: RQ's requeue empties it, and an empty one would mean that another job was saved over this id.
  redis.call('HDEL', name, 'crashes', 'crashes_total', 'losses', 'executions', 'waits', 'best_offset', 'best_seq',
    'cancel', 'error_kind', 'error_reason', 'deadline', 'queue_deadline', 'company', 'suspected', 'failed_on',
    'passed_at', 'interrupted', 'raised', 'started_at')
  redis.call('HSET', name, 'attempt', '0', 'retries_left', redis.call('HGET', name, 'max_retries') or '0', 'last', '')
  history(id, 'requeued', '', '', redis.call('HGET', KEY.checkpoint .. id, 'offset') or '0', '', 'was ' .. verdict)
  count('requeued', queue)
end

-- RQ's `enqueue` saved a plain job over a request: remove everything of the request. (If the job calls a task, the
-- worker that claims it makes a request of it: see adopt.lua.)
local function become_plain(id, queue)
  drop_checkpoint(id)
  leave_registries(queue, id)
  redis.call('DEL', KEY.output .. id, KEY.history .. id, KEY.results .. id)
  redis.call('PERSIST', KEY.job .. id)
  -- RQ writes both, or neither.
  if redis.call('HEXISTS', KEY.job .. id, 'retry_intervals') == 0 then
    redis.call('HDEL', KEY.job .. id, 'retries_left')
  end
  redis.call('HDEL', KEY.job .. id,
    'task', 'payload', 'nonce', 'digest', 'client', 'attempt', 'max_retries', 'execution', 'holder', 'claimed',
    'last', 'epoch', 'entered', 'executions', 'crashes', 'crashes_total', 'losses', 'waits', 'best_offset',
    'best_seq', 'cancel', 'error_kind', 'error_reason', 'deadline', 'queue_deadline', 'step_ms', 'company',
    'suspected', 'failed_on', 'passed_at', 'interrupted', 'trace', 'degraded', 'payload_aside', 'stretched',
    'raised', 'aside_at', 'counted_from', 'dated')
  history(id, 'requeued', '', '', '0', '', 'another job was enqueued under its id')
  count('requeued', queue)
end
