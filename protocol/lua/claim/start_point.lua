--- @include claim/read_job
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/restart
--- @include lib/checkpoint/stale

-- Where a request that was claimed before goes on: its checkpoint, {} if it begins from zero. One that is stale, or
-- that this claim is not to use, is deleted, and the request begins again.
local function start_point(id, execution, job, ttl_ms, resume)
  local point, reason = read_point(id), nil
  if not point.at then
    if next(point) or redis.call('EXISTS', KEY.output .. id) == 1 then reason = 'no checkpoint' end
  elseif number_of(point.at) < now_ms - ttl_ms and number_of(point.at) < stale_before(ttl_ms) then
    reason = 'the checkpoint was older than ' .. int(ttl_ms / 1000) .. ' s'
  elseif resume == '0' then
    reason = 'resuming is turned off'
  end
  if not reason then return point end
  restart(id, reason, execution)
  job.epoch = redis.call('HGET', KEY.job .. id, 'epoch')
  return {}
end
