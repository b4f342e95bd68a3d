--- @include lib/basics/counters
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/hint
--- @include lib/checkpoint/history
--- @include lib/queue/forget
--- @include lib/rq/retention

-- Finish a cancel whose state is written already: checkpoint, history, TTL, counters, and the producer is told.
local function close_canceled(queue, id, execution, worker, event, reason)
  local job = redis.call('HMGET', KEY.job .. id, 'failure_ttl', 'client')
  drop_checkpoint(id)
  history(id, event, worker, execution, '0', '', reason)
  share_ttl(id, number_of(job[1], 7 * DAY))
  count('canceled', queue)
  hint(job[2], id, 'end')
end
